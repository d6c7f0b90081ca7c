"""RetinaNet with Twins-PCPVT-L on COCO, 36 epochs at many scales; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/retinanet_pcpvt_l_fpn_3x_ms_coco.py 8
    bash dist_test.sh configs/retinanet_pcpvt_l_fpn_3x_ms_coco.py checkpoint_file 8 --eval mAP

To expect: neither the config nor its AP is published; it completes the grid.
"""

from detection.configs.recipes import retinanet_3x_ms_setting

config = retinanet_3x_ms_setting(backbone="pcpvt_large")
