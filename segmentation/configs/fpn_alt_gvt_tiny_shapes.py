"""Semantic FPN with alt_gvt_tiny on the embedded shapes, in minutes on two CPU cores; global batch 16.

    bash dist_train.sh configs/fpn_alt_gvt_tiny_shapes.py 1 --pretrained ../output/shapes/checkpoint_best.pth
    bash dist_test.sh configs/fpn_alt_gvt_tiny_shapes.py checkpoint_file 1 --eval mIoU

The pretrained weights are those of the README's first command.

To expect: mIoU 83.2 % (seed 0) after 5 minutes.
"""

from segmentation.configs.recipes import shapes_setting

config = shapes_setting("alt_gvt_tiny", head="fpn", channels=64, neck_channels=128, iterations=1700)
