// Copies a text of the page; without a script the texts can still be selected.
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    const said = document.getElementById(button.dataset.copy + "-said");
    try {
      await navigator.clipboard.writeText(source.textContent);
      said.textContent = "copied";
    } catch {  // no permission: select it, for the user's own Ctrl-C
      const folded = source.closest("details");
      if (folded) folded.open = true;
      getSelection().selectAllChildren(source);
      said.textContent = "selected: copy it with Ctrl-C";
    }
  });
}
