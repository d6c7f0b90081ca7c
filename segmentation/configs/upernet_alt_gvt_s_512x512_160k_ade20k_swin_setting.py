"""UPerNet with Twins-SVT-S on ADE20K, 160,000 iterations; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/upernet_alt_gvt_s_512x512_160k_ade20k_swin_setting.py 8
    bash dist_test.sh configs/upernet_alt_gvt_s_512x512_160k_ade20k_swin_setting.py checkpoint_file 8 --eval mIoU

To expect: mIoU 46.2 at one scale, 47.1 with --aug-test (README of the paper's repository); 46.24 at the end of its
training log.
"""

from segmentation.configs.recipes import upernet_swin_setting

config = upernet_swin_setting(backbone="alt_gvt_small")
