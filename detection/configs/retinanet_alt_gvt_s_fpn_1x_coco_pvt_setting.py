"""RetinaNet with Twins-SVT-S on COCO, 12 epochs at one scale; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/retinanet_alt_gvt_s_fpn_1x_coco_pvt_setting.py 8
    bash dist_test.sh configs/retinanet_alt_gvt_s_fpn_1x_coco_pvt_setting.py checkpoint_file 8 --eval mAP

To expect, by tables 3 and 8 of the paper (arXiv 2104.13840), in percent on val2017:
box AP 43.0 (AP50 64.2, AP75 46.3).
"""

from detection.configs.recipes import retinanet_1x_pvt_setting

config = retinanet_1x_pvt_setting(backbone="alt_gvt_small")
