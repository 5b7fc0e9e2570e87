"""The demo: train one model five ways on real images and show what happened.

`settings` says what to run, `data` and `models` what to run it on, `train` runs it side by side, `results` is what came
out, and `page` (with `plots` and `programs`) shows it. Nothing here prints; `nm_compiler.cli` does.
"""
