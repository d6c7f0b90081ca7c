"""Mask R-CNN with Twins-PCPVT-B on COCO, 12 epochs at one scale; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/mask_rcnn_pcpvt_b_fpn_1x_coco_pvt_setting.py 8
    bash dist_test.sh configs/mask_rcnn_pcpvt_b_fpn_1x_coco_pvt_setting.py checkpoint_file 8 --eval bbox segm

To expect, by tables 4 and 8 of the paper (arXiv 2104.13840), in percent on val2017:
box AP 44.6 (AP50 66.7, AP75 48.9) and mask AP 40.9 (AP50 63.8, AP75 44.2).
"""

from detection.configs.recipes import mask_rcnn_1x_pvt_setting

config = mask_rcnn_1x_pvt_setting(backbone="pcpvt_base")
