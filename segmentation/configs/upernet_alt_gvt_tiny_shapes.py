"""UPerNet with alt_gvt_tiny on the embedded shapes, in minutes on two CPU cores; global batch 16.

    bash dist_train.sh configs/upernet_alt_gvt_tiny_shapes.py 1 --pretrained ../output/shapes/checkpoint_best.pth
    bash dist_test.sh configs/upernet_alt_gvt_tiny_shapes.py checkpoint_file 1 --eval mIoU

The pretrained weights are those of the README's first command.

To expect: mIoU 85.1 % (seed 0) after 5 minutes.
"""

from segmentation.configs.recipes import shapes_setting

config = shapes_setting(backbone="alt_gvt_tiny")
