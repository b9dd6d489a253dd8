"""Score-transfer: which domains will a fine-tune change, from a sparse autoencoder of the untouched model (STS)."""
