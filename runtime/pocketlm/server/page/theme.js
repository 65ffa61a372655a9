// Runs before the first paint, so that a chosen theme does not flash. The default follows the system.
"use strict";

(() => {
  const KEY = "pocketlm.theme";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  function stored() {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage is forbidden: the choice lasts as long as the page
    }
  }

  function store(theme) {
    try {
      if (theme) localStorage.setItem(KEY, theme);
      else localStorage.removeItem(KEY);
    } catch {
      // As above.
    }
  }

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  }

  function show() {
    const button = document.getElementById("theme");
    if (button) button.setAttribute("aria-pressed", String(isDark()));
    root.classList.toggle("dark", isDark());
  }

  function apply(theme) {
    if (theme === "dark" || theme === "light") root.dataset.theme = theme;
    else delete root.dataset.theme;
    show();
  }

  /** To the other theme. What the system has anyway is not kept, so that the page follows the system again. */
  function toggle() {
    const next = isDark() ? "light" : "dark";
    const chosen = (next === "dark") === dark.matches ? null : next;
    store(chosen);
    apply(chosen);
  }

  apply(stored());
  dark.addEventListener("change", show);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", toggle);
    show();
  });
})();
