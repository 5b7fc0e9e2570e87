"""The demo: train one model five ways on real images and show what happened. Nothing here prints; `nm_compiler.cli` does.

settings   what to run
data       on which images
cifar      those of CIFAR-10, from disk
models     which networks
train      the race: all contestants side by side
progress   a bar while it runs
results    what came out
words      the same in sentences
page       all of it as one HTML file
template   the words and the style of that page
plots      its pictures
programs   its graphs, before and after
"""
