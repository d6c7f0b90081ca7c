"""RetinaNet with Twins-SVT-S on COCO, 36 epochs at many scales; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/retinanet_alt_gvt_s_fpn_3x_ms_coco.py 8
    bash dist_test.sh configs/retinanet_alt_gvt_s_fpn_3x_ms_coco.py checkpoint_file 8 --eval mAP

To expect, by tables 3 and 8 of the paper (arXiv 2104.13840), in percent on val2017:
box AP 45.6 (AP50 67.1, AP75 48.6).
"""

from detection.configs.recipes import retinanet_3x_ms_setting

config = retinanet_3x_ms_setting(backbone="alt_gvt_small")
