"""How the page looks, in light and dark: no fonts or the like are fetched from elsewhere."""

import gradio as gr

FONT = ["system-ui", "sans-serif"]
MONO = ["ui-monospace", "monospace"]

CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.7rem; margin: .2rem 0; }
#head p { color: var(--body-text-color-subdued); margin: 0; }
.heading { color: var(--body-text-color-subdued); font-size: .85rem; margin-bottom: -.6rem; }
#examples .grid-wrap, #stages .grid-wrap { min-height: 0; max-height: none; padding: 0; }
#examples .grid-container, #stages .grid-container { padding: 0; margin: 0; gap: .4rem; }
#examples .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)); grid-auto-rows: auto; }
#examples .thumbnail-item { width: 100%; min-width: 0; height: auto; aspect-ratio: 1; }
#examples .caption-label { display: none; }
#slider { min-height: 15rem; }
#status progress { appearance: none; display: block; width: 100%; height: .45rem; margin-top: .5rem; border: 0;
  border-radius: 1rem; overflow: hidden; background: var(--neutral-200); color: var(--color-accent); }
.dark #status progress { background: var(--neutral-700); }
#status progress::-webkit-progress-bar { background: transparent; }
#status progress::-webkit-progress-value { background: var(--color-accent); }
#status progress::-moz-progress-bar { background: var(--color-accent); }
#command textarea { font-family: var(--font-mono); }
"""


def theme() -> gr.themes.Base:
    return gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=FONT, font_mono=MONO).set(
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_label_background_fill="none",
        block_label_background_fill_dark="none",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_label_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
