"""The frame of the page: words and style around what `page` fills in (`string.Template`)."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nm_compiler demo: $title</title>
<style>
:root{--ink:#1b2430;--soft:#5b6675;--line:#e3e7ed;--mark:#fff3c4}
*{box-sizing:border-box}
body{margin:0;background:#f5f6f9;color:var(--ink);font:16px/1.6 system-ui,-apple-system,"Segoe UI",sans-serif}
header,section{max-width:1120px;margin:1.2rem auto;padding:1.6rem 2.2rem;background:#fff}
header,section{border:1px solid var(--line);border-radius:10px;overflow-x:auto}
section.wide{max-width:1500px}
h1{font-size:1.9rem;line-height:1.2;margin:.2rem 0 .8rem}
h2{font-size:1.25rem;margin:0 0 .5rem}
h3{font-size:.95rem;margin:0 0 .5rem}
p{max-width:76ch;margin:.5rem 0}
.soft,.soft p{color:var(--soft);font-size:.92rem}
figure{margin:.8rem 0 0;overflow-x:auto}
figure svg{display:block;max-width:100%;height:auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif !important}
code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.88em}
.groups{display:grid;grid-template-columns:auto repeat(3,max-content);gap:.5rem 1.1rem;margin:1rem 0}
.groups{align-items:center;justify-content:start}
.groups div{display:flex;border:2px solid #7d8794;border-radius:5px;overflow:hidden}
.groups b,.groups i{width:3rem;text-align:center;font-style:normal;font-variant-numeric:tabular-nums;padding:.1rem 0}
.groups b{background:#dcebfa;font-weight:600}
.groups i{color:#b3bbc7;background:#fff}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.35rem 1.2rem;margin:.8rem 0}
dt{font-weight:600} dd{margin:0;max-width:76ch}
table.results{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.8rem 0;width:100%}
.results th,.results td{text-align:left;padding:.42rem .8rem;white-space:nowrap}
.results th{color:var(--soft);font-weight:600;font-size:.88rem;border-bottom:2px solid var(--line)}
.results tr.first td{border-top:1px solid #cdd3dc}
.dot{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.55em}
.programs{display:grid;grid-template-columns:repeat(auto-fit,minmax(21rem,1fr));gap:1rem;margin-top:.8rem}
.programs>div{border:1px solid var(--line);border-radius:8px;padding:.8rem;background:#fbfcfd;min-width:0}
.programs code{font-size:.72rem;line-height:1.45;overflow-wrap:anywhere}
.programs code div{padding:.05rem .3rem .05rem 1.8rem;text-indent:-1.5rem;border-radius:3px;margin-bottom:1px}
.programs .changed{background:#fffaea}
.programs .new{background:var(--mark)}
details{margin:.4rem 0;overflow-x:auto}
summary{cursor:pointer;font-weight:600}
details .nm-report h2{display:none}
.found{font-size:1.05rem}
@media (max-width:700px){header,section{padding:1rem;border-radius:0} dl{grid-template-columns:1fr} dd{margin-bottom:.6rem}}
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>A neural network multiplies by millions of weights, and many of them hardly matter. <b>N:M sparsity</b> sets weights to
exactly zero in a pattern that hardware can use: in every group of <b>M</b> neighbouring weights at most <b>N</b> stay. At 2:4
half of the weights are gone, at 1:4 three quarters. The question is <em>which</em> ones to keep, and this page compares ways
to find out.</p>
$groups
<dl>
$methods
</dl>
<figure>$samples</figure>
<p class="soft">Run: $description.</p>
</header>
<section>
<h2>Results</h2>
<p class="found">$found</p>
$table
<div class="soft">
<p><b>Test accuracy</b> is of the frozen model, on images it never saw$spread.
<b>Magnitude retained</b> is Σ|W·mask| / Σ|W| at the end of training.$retained
<b>Exact pattern</b> is what <code>nm.verify</code> counted in the frozen model$worst. The first and the
last weight stay dense.</p>
<p><b>Step time</b> is the median of an optimizer step plus the mean cost of keeping the masks, relative to dense. All
methods take turns, step by step. Training computes with dense kernels, and masks come on top. The smaller the network, the
more they weigh; the README has the times of larger ones. Zeros pay off afterwards, at inference. $upkeep</p>
<p><b>Same for everyone:</b> initial weights, data order, random shifts, number of steps, and
$recipe. No setting was tuned for any one method.</p>
</div>
</section>
$sections
</body>
</html>
"""
