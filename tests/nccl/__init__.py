"""Which launches each rank makes, recorded on gloo, and whether NCCL could complete them."""
