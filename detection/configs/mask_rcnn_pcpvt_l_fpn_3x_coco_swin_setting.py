"""Mask R-CNN with Twins-PCPVT-L on COCO, 36 epochs at many scales; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/mask_rcnn_pcpvt_l_fpn_3x_coco_swin_setting.py 8
    bash dist_test.sh configs/mask_rcnn_pcpvt_l_fpn_3x_coco_swin_setting.py checkpoint_file 8 --eval bbox segm

To expect: neither the config nor its AP is published; it completes the grid.
"""

from detection.configs.recipes import mask_rcnn_3x_swin_setting

config = mask_rcnn_3x_swin_setting(backbone="pcpvt_large")
