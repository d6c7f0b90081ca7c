"""RetinaNet with Twins-PCPVT-B on COCO, 36 epochs at many scales; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/retinanet_pcpvt_b_fpn_3x_ms_coco.py 8
    bash dist_test.sh configs/retinanet_pcpvt_b_fpn_3x_ms_coco.py checkpoint_file 8 --eval mAP

To expect, by tables 3 and 8 of the paper (arXiv 2104.13840), in percent on val2017:
box AP 46.4 (AP50 67.7, AP75 49.8).
"""

from detection.configs.recipes import retinanet_3x_ms_setting

config = retinanet_3x_ms_setting(backbone="pcpvt_base")
