"""CSS, templates and scripts of the pages: system fonts, and nothing loaded from other hosts."""

from __future__ import annotations

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACE_FONTS = ["ui-monospace", "Consolas", "monospace"]
GREYS = (
    *("#fbfbfa", "#f4f5f5", "#e4e7ea", "#d3d8dd", "#a3abb5", "#667180"),
    *("#4d5764", "#363f4a", "#222931", "#14181e", "#0e1116"),
)

# Uses gradio's variables, so that its theme sets light and dark colors.
CSS = """
.gradio-container { width: 100% !important; max-width: 1140px !important; margin: 0 auto !important;
  padding: 0 0 48px !important; }
.gradio-container .html-container { padding: 0; }
.gradio-container .form, .gradio-container .block { border-radius: 12px; }
.vq-head { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: baseline; padding: 20px 2px 4px; }
.vq-head h1 { font-size: 1.35rem; margin: 0; letter-spacing: -.01em; }
.vq-head b { font-weight: 600; }
.vq-head p { margin: 0; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.vq-head a { margin-left: auto; color: var(--link-text-color); }

.vq-drop { display: grid; place-items: center; min-height: 240px; padding: 8px; cursor: pointer; text-align: center;
  border: 1.5px dashed var(--border-color-primary); border-radius: 12px; background: var(--background-fill-secondary); }
.vq-drop:hover, .vq-drop:focus-within, .vq-over .vq-drop { border-color: var(--color-accent); }
.vq-drop input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.vq-drop img { max-width: 100%; max-height: 340px; min-width: min(220px, 100%); object-fit: contain;
  border-radius: 8px; }
.vq-drop b { display: block; font-weight: 600; }
.vq-drop span { color: var(--body-text-color-subdued); font-size: .9rem; }
.vq-message { min-height: 1.3em; margin: 6px 2px 0; font-size: .9rem; color: var(--error-text-color, #b42318); }
.dark .vq-message { color: #ffb4a8; }
.vq-examples { display: grid; grid-template-columns: repeat(6, 1fr); gap: 8px; margin-top: 2px; }
.vq-examples button { padding: 0; border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden;
  aspect-ratio: 1; background: none; cursor: pointer; }
.vq-examples button:hover, .vq-examples button:focus-visible { outline: 2px solid var(--color-accent); }
.vq-examples img { width: 100%; height: 100%; object-fit: cover; display: block; }

.vq-cards { display: grid; gap: 12px; }
.vq-card { display: grid; grid-template-columns: 1fr auto; gap: 16px; padding: 16px; border-radius: 12px;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill); overflow-wrap: anywhere; }
.vq-card p { margin: 0; } .vq-card > div { min-width: 0; }
.vq-question { color: var(--body-text-color-subdued); font-size: .95rem; }
.vq-answer { font-size: 1.3rem; font-weight: 600; margin-top: 2px !important; }
.vq-answer small { font-size: .9rem; font-weight: 400; color: var(--body-text-color-subdued); margin-left: 6px; }
.vq-bar { display: grid; grid-template-columns: minmax(3.5rem, 34%) 1fr auto; gap: 10px; align-items: center;
  font-size: .9rem; margin-top: 7px; }
.vq-bar i { display: block; height: 7px; border-radius: 4px; overflow: hidden;
  background: var(--border-color-primary); }
.vq-bar i::before { content: ""; display: block; height: 100%; width: var(--part); border-radius: 4px;
  background: var(--body-text-color-subdued); }
.vq-bar.vq-best i::before { background: var(--color-accent); }
.vq-bar span:last-child { min-width: 3.6rem; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); }
.vq-card figure { margin: 0; width: 200px; } .vq-card figure img { width: 100%; border-radius: 8px; display: block; }
.vq-card figcaption { font-size: .8rem; color: var(--body-text-color-subdued); margin-top: 6px; }
.vq-card figcaption b { font-weight: 600; }
.vq-legend { display: flex; gap: 8px; align-items: center; margin-bottom: 2px; }
.vq-legend i { flex: 1; height: 9px; border-radius: 3px; border: 1px solid var(--border-color-primary);
  background-color: #fff; }
/* Gradio has no spinner for pending HTML. It copies rules by their cssText, which loses a `border` with a variable when
   another property overrides part of it. */
#ask-answers, #compare-answers { position: relative; }
#ask-answers:has(.pending)::after, #compare-answers:has(.pending)::after { content: ""; position: absolute; top: 24px;
  left: calc(50% - 16px); width: 32px; height: 32px; border-radius: 50%; animation: vq-turn .8s linear infinite;
  border-style: solid; border-width: 3px; box-sizing: border-box;
  border-color: var(--color-accent) var(--border-color-primary) var(--border-color-primary); }
@keyframes vq-turn { to { transform: rotate(1turn); } }
.vq-note { color: var(--body-text-color-subdued); padding: 28px 16px; text-align: center; margin: 0;
  border: 1px dashed var(--border-color-primary); border-radius: 12px; overflow-wrap: anywhere; }
.vq-error { border-style: solid; color: var(--error-text-color, #b42318); } .dark .vq-error { color: #ffb4a8; }
.vq-two { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; } .vq-two > section { min-width: 0; }
.vq-two h2 { font-size: 1rem; margin: 0 0 10px; overflow-wrap: anywhere; }
.vq-two .vq-card { grid-template-columns: 1fr; }

.vq-count { color: var(--body-text-color-subdued); margin: 0 2px 10px; }
.vq-grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 12px; }
.vq-tile { border: 1px solid var(--border-color-primary); border-radius: 12px; overflow: hidden; font-size: .92rem;
  background: var(--block-background-fill); overflow-wrap: anywhere; }
.vq-tile > img { width: 100%; height: 150px; object-fit: contain; display: block;
  background: var(--background-fill-secondary); }
.vq-tile > div { padding: 10px 12px 12px; } .vq-tile p { margin: 0; }
.vq-tile p + p { margin-top: 4px; } .vq-tile b { font-weight: 600; }
.vq-tile small, .vq-tile .vq-small { color: var(--body-text-color-subdued); font-size: .84rem; }
.vq-mark { display: inline-block; padding: 0 7px; border-radius: 9px; font-size: .78rem; font-weight: 600; }
.vq-right { background: #d9f0df; color: #14532d; } .vq-wrong { background: #fbe0dc; color: #7a1f14; }
.dark .vq-right { background: #173b26; color: #a7e3bb; } .dark .vq-wrong { background: #4a1d17; color: #ffc2b8; }

@media (min-width: 641px) { .vq-side { position: sticky; top: 16px; align-self: flex-start; } }
@media (max-width: 1100px) { .vq-card figure { width: 150px; } }
@media (max-width: 640px) {
  .vq-card { grid-template-columns: 1fr; } .vq-card figure { width: 100%; } .vq-two { grid-template-columns: 1fr; }
  #ask-attribution .wrap { gap: 6px; } #ask-attribution label { padding: 6px 9px; }
  .vq-head a { margin-left: 0; } .vq-grid { grid-template-columns: 1fr 1fr; } .vq-drop { min-height: 180px; }
}
"""

# Handlebars template, rendered again when the value (the name of a cached image) changes.
UPLOAD_TEMPLATE = """
<label class="vq-drop">
<input type="file" accept="image/jpeg,image/png,image/webp,image/gif,image/bmp" aria-label="Image">
{{#if value}}<img src="image/{{value}}" alt="the uploaded image">
{{else}}<div><b>Drop an image here, or choose one</b><span>{{hint}}</span></div>{{/if}}
</label>
<p class="vq-message" role="alert"></p>
<div class="vq-examples">{{{examples}}}</div>
"""

# Uploads an image by itself; later events hold only its name, so that no event carries a file.
UPLOAD_SCRIPT = """
const showMessage = (text) => { element.querySelector('.vq-message').textContent = text; };
const setImage = (name) => { props.value = name; trigger('change'); };
async function upload(file) {
  if (!file) return;
  if (file.size > props.max_bytes) { showMessage(props.too_large); return; }
  showMessage('');
  let response, result;
  try {
    response = await fetch('image', { method: 'POST', body: file });
    result = await response.json();
  } catch { showMessage('The server cannot be reached.'); return; }
  if (response.ok) setImage(result.name); else showMessage(result.error);
}
element.addEventListener('change', (event) => {
  if (event.target.type === 'file') { upload(event.target.files[0]); event.target.value = ''; }
});
element.addEventListener('click', (event) => {
  const example = event.target.closest('[data-image]');
  if (example) setImage(example.dataset.image);
});
element.addEventListener('dragover', (event) => { event.preventDefault(); element.classList.add('vq-over'); });
element.addEventListener('dragleave', () => element.classList.remove('vq-over'));
element.addEventListener('drop', (event) => {
  event.preventDefault(); element.classList.remove('vq-over'); upload(event.dataTransfer.files[0]);
});
document.addEventListener('paste', (event) => {
  const file = [...event.clipboardData.files].find((file) => file.type.startsWith('image/'));
  if (file && element.offsetParent !== null) upload(file);
});
"""
