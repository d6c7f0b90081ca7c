"""Mask R-CNN with Twins-SVT-L on COCO, 36 epochs at many scales; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/mask_rcnn_alt_gvt_l_fpn_3x_coco_swin_setting.py 8
    bash dist_test.sh configs/mask_rcnn_alt_gvt_l_fpn_3x_coco_swin_setting.py checkpoint_file 8 --eval bbox segm

To expect: the config is published, but the paper has no AP for it.
"""

from detection.configs.recipes import mask_rcnn_3x_swin_setting

config = mask_rcnn_3x_swin_setting(backbone="alt_gvt_large")
