// Our own few lines: copying, choosing files by dropping them, and keeping the end of a log in sight.
"use strict";

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(document.querySelector(button.dataset.copy).innerText.trim());
  const label = button.textContent;
  button.textContent = button.dataset.copied;
  setTimeout(() => { button.textContent = label; }, 1500);
});

// A log that is read at its end stays there; one that is read further up stays where it is.
document.addEventListener("htmx:before:swap", () => {
  for (const log of document.querySelectorAll(".log")) {
    log.dataset.atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  }
});
document.addEventListener("htmx:after:swap", () => {
  for (const log of document.querySelectorAll(".log")) {
    if (log.dataset.atEnd !== "false") log.scrollTop = log.scrollHeight;
  }
});
for (const log of document.querySelectorAll(".log")) log.scrollTop = log.scrollHeight;

// Mistakes of a form, each beside its field: the event "mistakes" has {fields: {id: sentence}}, and clears all others.
document.addEventListener("mistakes", (event) => {
  const { fields } = event.detail;
  for (const error of document.querySelectorAll(".error[id^='error-']")) {
    const id = error.id.slice("error-".length);
    error.textContent = fields[id] ?? "";
    document.getElementById(id)?.toggleAttribute("aria-invalid", id in fields);
    if (id in fields) document.getElementById(id)?.setAttribute("aria-invalid", "true");
  }
});

// A button says in its form what is asked for, before the form is sent.
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-asks]");
  if (button) button.form.elements.asked.value = button.dataset.asks;
}, { capture: true });

// A link to a field opens what the field is folded into.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  const field = link && document.getElementById(link.getAttribute("href").slice(1));
  field?.closest("details")?.setAttribute("open", "");
  field?.focus();
});
