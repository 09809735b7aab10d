"""Finished adaptations of one base put together: stacked, merged into one LoRA, or fused. One file per way."""
