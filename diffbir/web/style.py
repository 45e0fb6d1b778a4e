"""How the page looks, in light and dark: no fonts or the like are fetched from elsewhere."""

import gradio as gr

FONT = ["system-ui", "sans-serif"]
MONO = ["ui-monospace", "monospace"]

CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.7rem; margin: .2rem 0; }
#head p { color: var(--body-text-color-subdued); margin: 0; }
#status { padding: .3rem .2rem; }
#status progress { width: 100%; height: .5rem; display: block; margin-top: .4rem; accent-color: var(--color-accent); }
#command textarea { font-family: var(--font-mono); }
"""


def theme() -> gr.themes.Base:
    return gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=FONT, font_mono=MONO)
