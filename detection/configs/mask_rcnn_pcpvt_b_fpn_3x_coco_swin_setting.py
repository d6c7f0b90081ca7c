"""Mask R-CNN with Twins-PCPVT-B on COCO, 36 epochs at many scales; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/mask_rcnn_pcpvt_b_fpn_3x_coco_swin_setting.py 8
    bash dist_test.sh configs/mask_rcnn_pcpvt_b_fpn_3x_coco_swin_setting.py checkpoint_file 8 --eval bbox segm

To expect, by tables 4 and 8 of the paper (arXiv 2104.13840), in percent on val2017:
box AP 47.9 (AP50 70.1, AP75 52.5) and mask AP 43.2 (AP50 67.2, AP75 46.3).
"""

from detection.configs.recipes import mask_rcnn_3x_swin_setting

config = mask_rcnn_3x_swin_setting(backbone="pcpvt_base")
