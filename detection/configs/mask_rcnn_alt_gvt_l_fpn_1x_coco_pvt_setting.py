"""Mask R-CNN with Twins-SVT-L on COCO, 12 epochs at one scale; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/mask_rcnn_alt_gvt_l_fpn_1x_coco_pvt_setting.py 8
    bash dist_test.sh configs/mask_rcnn_alt_gvt_l_fpn_1x_coco_pvt_setting.py checkpoint_file 8 --eval bbox segm

To expect, by tables 4 and 8 of the paper (arXiv 2104.13840), in percent on val2017:
box AP 45.9 and mask AP 41.6.
"""

from detection.configs.recipes import mask_rcnn_1x_pvt_setting

config = mask_rcnn_1x_pvt_setting(backbone="alt_gvt_large")
