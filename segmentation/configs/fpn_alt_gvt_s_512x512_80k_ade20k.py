"""Semantic FPN with Twins-SVT-S on ADE20K, 80,000 iterations; global batch 32 (8 GPUs x 4 images).

    bash dist_train.sh configs/fpn_alt_gvt_s_512x512_80k_ade20k.py 8
    bash dist_test.sh configs/fpn_alt_gvt_s_512x512_80k_ade20k.py checkpoint_file 8 --eval mIoU

To expect: mIoU 43.2 (table 2 of the paper, arXiv 2104.13840); its training log is not available.
"""

from segmentation.configs.recipes import fpn_pvt_setting

config = fpn_pvt_setting(backbone="alt_gvt_small")
