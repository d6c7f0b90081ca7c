"""UPerNet with Twins-SVT-B on ADE20K, 160,000 iterations; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/upernet_alt_gvt_b_512x512_160k_ade20k_swin_setting.py 8
    bash dist_test.sh configs/upernet_alt_gvt_b_512x512_160k_ade20k_swin_setting.py checkpoint_file 8 --eval mIoU

To expect: mIoU 47.4 at one scale, 48.9 with --aug-test (README of the paper's repository); 47.7 at one scale in
table 2 of the paper (arXiv 2104.13840), and 47.69 at the end of its training log.
"""

from segmentation.configs.recipes import upernet_swin_setting

config = upernet_swin_setting(backbone="alt_gvt_base")
