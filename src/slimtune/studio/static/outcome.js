// The votes: the keys 1, 2 and 0 judge, and the field for a prompt is there where one is typed.
"use strict";

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, textarea, select, [contenteditable]");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  document.querySelector(`#ballot [data-key="${CSS.escape(event.key)}"]:not(:disabled)`)?.click();
});

const source = document.getElementById("source");
source?.addEventListener("change", () => {
  document.getElementById("typed").hidden = source.value !== "";
});

document.addEventListener("htmx:after:swap", () => {
  const ballot = document.querySelector("#ballot .ballot");
  // The keys are for the ballot now, and not for the field in which the prompt was typed.
  if (ballot && document.activeElement?.closest("#contest")) document.activeElement.blur();
  if (document.querySelector("#ballot [data-voted]")) {
    const prompt = document.querySelector("#typed textarea");
    prompt.value = "";
    prompt.focus();
  }
});
