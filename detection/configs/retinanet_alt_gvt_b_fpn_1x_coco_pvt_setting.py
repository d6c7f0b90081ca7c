"""RetinaNet with Twins-SVT-B on COCO, 12 epochs at one scale; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/retinanet_alt_gvt_b_fpn_1x_coco_pvt_setting.py 8
    bash dist_test.sh configs/retinanet_alt_gvt_b_fpn_1x_coco_pvt_setting.py checkpoint_file 8 --eval mAP

To expect, by tables 3 and 8 of the paper (arXiv 2104.13840), in percent on val2017:
box AP 45.3 (AP50 66.7, AP75 48.1).
"""

from detection.configs.recipes import retinanet_1x_pvt_setting

config = retinanet_1x_pvt_setting(backbone="alt_gvt_base")
