"""Mask R-CNN with Twins-SVT-B on COCO, 36 epochs at many scales; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/mask_rcnn_alt_gvt_b_fpn_3x_coco_swin_setting.py 8
    bash dist_test.sh configs/mask_rcnn_alt_gvt_b_fpn_3x_coco_swin_setting.py checkpoint_file 8 --eval bbox segm

To expect, by tables 4 and 8 of the paper (arXiv 2104.13840), in percent on val2017:
box AP 48.0 (AP50 69.5, AP75 52.7) and mask AP 43.0 (AP50 66.8, AP75 46.6).
"""

from detection.configs.recipes import mask_rcnn_3x_swin_setting

config = mask_rcnn_3x_swin_setting(backbone="alt_gvt_base")
