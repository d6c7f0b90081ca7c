"""UPerNet with Twins-PCPVT-S on ADE20K, 160,000 iterations; global batch 32 (8 GPUs x 4 images).

    bash dist_train.sh configs/upernet_pcpvt_s_512x512_160k_ade20k_swin_setting.py 8
    bash dist_test.sh configs/upernet_pcpvt_s_512x512_160k_ade20k_swin_setting.py checkpoint_file 8 --eval mIoU

To expect: mIoU 46.2 at one scale, 47.5 with --aug-test (README of the paper's repository); 46.21 at the end of its
training log.
"""

from segmentation.configs.recipes import upernet_swin_setting

config = upernet_swin_setting(backbone="pcpvt_small", batch_size=4, global_batch=32)
