"""RetinaNet with alt_gvt_tiny on the embedded shapes, in minutes on two CPU cores; global batch 8.

    bash dist_train.sh configs/retinanet_alt_gvt_tiny_shapes.py 1 --pretrained ../output/shapes/checkpoint_best.pth
    bash dist_test.sh configs/retinanet_alt_gvt_tiny_shapes.py checkpoint_file 1 --eval bbox

The pretrained weights are those of the README's first command.

To expect: bbox AP50 89.5 % after 2 minutes, and 89.4 % with two processes.
"""

from detection.configs.recipes import shapes_setting

config = shapes_setting("alt_gvt_tiny", "retinanet")
