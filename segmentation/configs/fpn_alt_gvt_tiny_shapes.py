from segmentation.configs.recipes import shapes_setting

config = shapes_setting(backbone="alt_gvt_tiny", head="fpn")
