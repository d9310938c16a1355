"""Networks: encoder, bottleneck, decoder, and the ReContrast model made of them."""
