"""UPerNet with Twins-PCPVT-L on ADE20K, 160,000 iterations; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/upernet_pcpvt_l_512x512_160k_ade20k_swin_setting.py 8
    bash dist_test.sh configs/upernet_pcpvt_l_512x512_160k_ade20k_swin_setting.py checkpoint_file 8 --eval mIoU

To expect: mIoU 48.6 at one scale, 49.8 with --aug-test (README of the paper's repository); 48.59 at the end of its
training log.
"""

from segmentation.configs.recipes import upernet_swin_setting

config = upernet_swin_setting(backbone="pcpvt_large")
