"""UPerNet with Twins-SVT-L on ADE20K, 160,000 iterations; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/upernet_alt_gvt_l_512x512_160k_ade20k_swin_setting.py 8
    bash dist_test.sh configs/upernet_alt_gvt_l_512x512_160k_ade20k_swin_setting.py checkpoint_file 8 --eval mIoU

To expect: mIoU 48.8 at one scale, 50.2 with --aug-test (README of the paper's repository); 48.77 at the end of its
training log.
"""

from segmentation.configs.recipes import upernet_swin_setting

config = upernet_swin_setting(backbone="alt_gvt_large", drop_path=0.3)
