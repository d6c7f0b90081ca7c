"""Mask R-CNN with Twins-SVT-S on COCO, 36 epochs at many scales; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/mask_rcnn_alt_gvt_s_fpn_3x_coco_swin_setting.py 8
    bash dist_test.sh configs/mask_rcnn_alt_gvt_s_fpn_3x_coco_swin_setting.py checkpoint_file 8 --eval bbox segm

To expect, by tables 4 and 8 of the paper (arXiv 2104.13840), in percent on val2017:
box AP 46.8 (AP50 69.2, AP75 51.2) and mask AP 42.6 (AP50 66.3, AP75 45.8).
"""

from detection.configs.recipes import mask_rcnn_3x_swin_setting

config = mask_rcnn_3x_swin_setting(backbone="alt_gvt_small")
