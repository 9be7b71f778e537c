// <label data-upload="/path" data-into="#field">: a file that is dropped or chosen is sent as it is, and the path under
// which it was kept goes into the field.
"use strict";

for (const zone of document.querySelectorAll("[data-upload]")) {
  const input = zone.querySelector("input[type=file]");
  const bar = zone.querySelector("progress");
  const notice = document.getElementById("notice");

  const say = (sentence) => {
    const said = document.createElement("p");
    said.className = "notice bad";
    said.textContent = sentence;
    notice.replaceChildren(said);
  };
  const send = (file) => {
    // A server that refuses it may close the connection before the browser reads why.
    if (file.size > Number(zone.dataset.most)) {
      say(zone.dataset.tooLarge);
      return;
    }
    const request = new XMLHttpRequest();
    request.open("POST", `${zone.dataset.upload}?name=${encodeURIComponent(file.name)}`);
    request.setRequestHeader("HX-Request", "true");
    for (const [name, value] of Object.entries(JSON.parse(document.body.getAttribute("hx-headers:inherited")))) {
      request.setRequestHeader(name, value);
    }
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.addEventListener("progress", (event) => { bar.value = event.loaded / event.total; });
    request.addEventListener("loadend", () => {
      bar.classList.add("hidden");
      if (request.status === 0) {
        say(zone.dataset.lost);
        return;
      }
      if (request.status !== 200) {
        notice.innerHTML = request.responseText;
        return;
      }
      const field = document.querySelector(zone.dataset.into);
      field.value = JSON.parse(request.responseText).path;
      field.dispatchEvent(new Event("change", { bubbles: true }));
    });
    notice.replaceChildren();
    bar.value = 0;
    bar.classList.remove("hidden");
    request.send(file);
  };

  input.addEventListener("change", (event) => {
    // It is no setting of the form.
    event.stopPropagation();
    if (input.files.length) send(input.files[0]);
    // Or the same file could not be chosen again.
    input.value = "";
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    zone.addEventListener(kind, (event) => {
      event.preventDefault();
      zone.classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) send(event.dataTransfer.files[0]);
    });
  }
}
