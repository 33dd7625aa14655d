"""Regular expressions that map the names of published checkpoints to ours, for `load_weights`."""

MAE_FAMILY = {
    r"mask_token": "decoder.mask_token",
    r"decoder_(embed|blocks|norm)\.": r"decoder.\1.",
    r"decoder_pred\.": "decoder.head.",
    r"(?=cls_token|pos_embed|patch_embed|blocks|norm)": "encoder.",
}
