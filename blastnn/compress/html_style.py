"""The style sheet of the report page."""

from __future__ import annotations

# Kinds of layer are told apart by this many colours, each with a round and then a square mark.
COLOURS = 8
NAMED_KINDS = 2 * COLOURS

_NAMES = ["paper", "card", "ink", "soft", "rule", "faint", "accent", "dense"]
_NAMES += ["warn", "warn-back", "warn-rule", *(f"k{index}" for index in range(COLOURS))]
_LIGHT = (
    "#fafaf8 #fff #1c1e22 #62666f #e3e3de #f1f1ed #2f5bd0 #a7adb8 #8a4b00 #fff6e3 #eac47c "
    "#2f5bd0 #e0692a #22936a #b8408f #8d7412 #1690b0 #7c55cf #cb3a48"
)
_DARK = (
    "#131519 #1a1d22 #e7e8ea #9aa0aa #2c3037 #21252b #85a7ff #626a77 #ffcb80 #2b2214 #6d5325 "
    "#85a7ff #ff9c66 #56c99a #f285cc #d6b64a #4ccbe6 #b798ff #ff828b"
)
# The colours of both themes by name, for pictures that stand outside the page as well.
LIGHT = dict(zip(_NAMES, _LIGHT.split(), strict=True))
DARK = dict(zip(_NAMES, _DARK.split(), strict=True))

_BASE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
 font:15px/1.55 Inter,ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
 font-variant-numeric:tabular-nums;-webkit-font-smoothing:antialiased}
main{max-width:66rem;margin:0 auto;padding:3.5rem 1.5rem 4rem}
h1,h2,h3,p,dl,ul,figure{margin:0;padding:0}
h1{font-size:clamp(1.9rem,5vw,2.75rem);line-height:1.12;letter-spacing:-.022em;font-weight:650;
 overflow-wrap:anywhere}
h2{font-size:1.15rem;letter-spacing:-.01em;font-weight:620;margin-bottom:.9rem;line-height:1.3}
h3{font-size:.85rem;font-weight:600;color:var(--soft);margin:0 0 .5rem}
section{margin-top:3rem;min-width:0}
b,strong{font-weight:620}
code,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
 font-size:.86em;overflow-wrap:anywhere;unicode-bidi:isolate}
.eyebrow{color:var(--soft);font-size:.85rem;margin-bottom:.5rem}
.lead{font-size:1.15rem;line-height:1.5;color:var(--soft);margin-top:.9rem;max-width:46rem;text-wrap:balance}
.lead b{color:var(--ink);white-space:nowrap}
.note{color:var(--soft);font-size:.85rem;margin-top:.7rem;max-width:50rem}
h2+.note{margin:-.6rem 0 1rem}
.absent{color:var(--soft);border:1px dashed var(--rule);border-radius:8px;padding:.75rem 1rem}
.warnings{background:var(--warn-back);border:1px solid var(--warn-rule);border-radius:10px;
 padding:1rem 1.25rem;margin-top:2rem}
.warnings h2{color:var(--warn);font-size:1rem;margin-bottom:.35rem}
.warnings ul{padding-left:1.1rem}.warnings li{overflow-wrap:anywhere}
.two{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));column-gap:3.5rem}
.hash{display:inline-block;max-width:12ch;overflow:hidden;text-overflow:ellipsis;
 white-space:nowrap;vertical-align:bottom;user-select:all}
"""

_FIGURES = """
.figures{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));margin-top:2.25rem;
 background:var(--card);border:1px solid var(--rule);border-radius:12px;overflow:hidden;gap:0}
.figures>div{padding:1.15rem 1.4rem 1.2rem;margin:0 -1px -1px 0;
 border:solid var(--rule);border-width:0 1px 1px 0}
.figures dt{font-size:.85rem;color:var(--soft)}
.figures dd{margin:0}
.figures .big{font-size:clamp(1.35rem,3.2vw,1.9rem);font-weight:620;letter-spacing:-.02em;
 line-height:1.3}
.figures .detail{font-size:.85rem;color:var(--soft)}
.arrow{color:var(--soft);font-weight:400}
"""

_CHARTS = """
.frame{overflow-x:auto}
.frame svg{display:block;width:100%;height:auto}
.plot text{font-size:12.5px;fill:var(--soft)}
.plot .grid line{stroke:var(--rule)}
.plot .grid .zero{stroke:var(--soft)}
.series{transition:opacity .12s}
.series path{fill:none;stroke:var(--c);stroke-width:1.5;stroke-linejoin:round;opacity:.75}
.mark{fill:var(--c);stroke:transparent;stroke-width:7}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;list-style:none;margin-top:.9rem;
 font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.45em;cursor:default;outline-offset:3px}
.legend svg{flex:none;fill:var(--c)}
.bars{font-size:.9rem}
.bar-row{display:grid;grid-template-columns:13rem minmax(3rem,1fr) 8.5rem;gap:.9rem;
 align-items:center;padding:.2rem 0}
.two .bar-row{grid-template-columns:9rem minmax(2rem,1fr) 8.5rem}
.by-two .bar-row:nth-child(even){padding-bottom:.75rem}
.by-two .bar-row:nth-child(odd){padding-bottom:0}
.bar-label{overflow-wrap:anywhere;line-height:1.3}
.bar-value{text-align:right;white-space:nowrap}
.bar-value small{color:var(--soft);font-size:.85em}
.bar{display:block;width:100%;height:14px;overflow:visible;border-left:1px solid var(--soft)}
.bar rect{fill:var(--c)}
.bar line{stroke:var(--ink);stroke-width:1.25;opacity:.65}
.split{display:block;width:100%;height:18px}
.split rect{fill:var(--c)}
.legend+.pairs{margin-top:.8rem}
.dense{--c:var(--dense)}.compressed{--c:var(--accent)}.k-other{--c:var(--soft)}
.part0{--c:var(--accent)}.part1{--c:color-mix(in srgb,var(--accent) 50%,var(--card))}
.part2{--c:var(--dense)}
"""

_TABLES = """
.scroll{overflow:auto;border:1px solid var(--rule);border-radius:10px;background:var(--card)}
.tall{max-height:78vh}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.86rem;line-height:1.4}
th,td{padding:.5rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-weight:500;color:var(--soft);white-space:nowrap;position:sticky;top:0;
 background:var(--card);z-index:1}
tbody th{font-weight:500;overflow-wrap:anywhere;min-width:9rem}
.number{text-align:right;white-space:nowrap}
.bars+.scroll,.scroll+.bars,.scroll+h3,.pairs+.scroll,.scroll+.pairs{margin-top:1.25rem}
.coverage td,.coverage code{white-space:nowrap}.coverage th,.coverage td{padding:.4rem .65rem}
.coverage td:last-child{white-space:normal;min-width:14rem}
.coverage small{display:block;color:var(--soft);font-size:.92em;white-space:normal;
 min-width:11rem}
.status{display:inline-flex;align-items:center;gap:.4em}
.status::before{content:"";width:.55em;height:.55em;border-radius:50%;background:var(--accent)}
.status.kept::before{background:none;box-shadow:inset 0 0 0 1.5px var(--soft)}
.cell-bar{display:block;padding-left:3.2rem;background:linear-gradient(var(--dense),var(--dense))
 left center/calc(2.8rem*var(--w)) .5rem no-repeat}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));column-gap:2.5rem}
.pairs>div{display:flex;justify-content:space-between;gap:1rem;padding:.36rem 0;
 border-bottom:1px solid var(--rule);font-size:.9rem;min-width:0}
.pairs dt{color:var(--soft);flex:none;max-width:55%;overflow-wrap:anywhere}
.pairs dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}
.two .pairs{grid-template-columns:1fr}
details{margin-top:1rem}
summary{cursor:pointer;font-weight:550;padding:.35rem 0}
details[open]>summary{margin-bottom:.6rem}
.sample{border:1px solid var(--rule);border-radius:10px;background:var(--card);
 padding:1rem 1.25rem;min-width:0}
.samples{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1rem;margin-top:1rem}
.prose{white-space:pre-wrap;overflow-wrap:anywhere;max-height:32rem;overflow:auto}
.same{color:var(--soft)}
footer{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--rule);color:var(--soft);
 font-size:.85rem;overflow-wrap:anywhere}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
"""

_PHONE = """
@media print,(max-width:60rem){
.two:has(.bars){grid-template-columns:minmax(0,1fr)}
.two>div+div h3{margin-top:1.2rem}
}
@media (max-width:46rem){
main{padding:2rem 1.1rem 3rem}
section{margin-top:2.5rem}
.two,.samples{grid-template-columns:minmax(0,1fr)}
.figures{grid-template-columns:repeat(2,minmax(0,1fr))}
.figures>div{padding:.9rem 1rem}
.figures .big{font-size:1.1rem}
.frame svg{min-width:30rem}
.plot text{font-size:17px}
.bar-row,.two .bar-row{grid-template-columns:minmax(0,1fr) auto;gap:.1rem .8rem}
.bar{grid-row:2;grid-column:1/-1}
}
@media (max-width:22rem){.figures{grid-template-columns:minmax(0,1fr)}}
"""

_PRINT = """
@media print{
@page{margin:14mm}
body{font-size:10.5pt;background:none}
main{max-width:none;padding:0}
section{margin-top:1.6rem}
h2,h3,h2+.note{break-after:avoid}
figure,.figures,.bar-row,.bars,.pairs>div,.warnings,tr{break-inside:avoid}
.scroll,.prose{overflow:visible;max-height:none}
.coverage{border:0}.coverage table{font-size:6.5pt}
.coverage th,.coverage td,.coverage code{padding:.15rem .3rem;white-space:normal}
.coverage tbody th{min-width:16em}.cell-bar{background:none;padding:0}
.coverage small,.coverage td:last-child{min-width:0}
.hash{max-width:none;white-space:normal}
thead th{position:static}
.status::before{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""


def _variables(theme: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in theme.items())


def _kind_rules() -> str:
    """Give each kind its colour, and fade the others while one is pointed at."""
    colours = (f".k{index}{{--c:var(--k{index % COLOURS})}}" for index in range(NAMED_KINDS))
    names = [f"k{index}" for index in range(NAMED_KINDS)] + ["k-other"]
    chosen = ":is(:hover,:focus)"
    fading = (f".plot:has(li.{name}{chosen}) .series:not(.{name}){{opacity:.1}}" for name in names)
    return "\n".join((*colours, *fading))


STYLE = "\n".join(
    (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}",
        # Paper is white, whatever the screen is.
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}",
        _BASE,
        _FIGURES,
        _CHARTS,
        _kind_rules(),
        _TABLES,
        _PHONE,
        _PRINT,
    )
)
