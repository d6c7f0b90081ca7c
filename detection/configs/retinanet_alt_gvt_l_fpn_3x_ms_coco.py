"""RetinaNet with Twins-SVT-L on COCO, 36 epochs at many scales; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/retinanet_alt_gvt_l_fpn_3x_ms_coco.py 8
    bash dist_test.sh configs/retinanet_alt_gvt_l_fpn_3x_ms_coco.py checkpoint_file 8 --eval mAP

To expect: the config is published, but the paper has no AP for it.
"""

from detection.configs.recipes import retinanet_3x_ms_setting

config = retinanet_3x_ms_setting(backbone="alt_gvt_large")
