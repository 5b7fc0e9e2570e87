"""The demo: train one model five ways on real images and show what happened."""
