"""UPerNet with Twins-PCPVT-B on ADE20K, 160,000 iterations; global batch 16 (8 GPUs x 2 images).

    bash dist_train.sh configs/upernet_pcpvt_b_512x512_160k_ade20k_swin_setting.py 8
    bash dist_test.sh configs/upernet_pcpvt_b_512x512_160k_ade20k_swin_setting.py checkpoint_file 8 --eval mIoU

To expect: mIoU 47.1 at one scale, 48.4 with --aug-test (README of the paper's repository); 47.78 at the end of its
training log.
"""

from segmentation.configs.recipes import upernet_swin_setting

config = upernet_swin_setting(backbone="pcpvt_base")
