// Before anything is drawn: what needs scripts is shown at once, and nothing moves afterwards.
document.documentElement.classList.add("has-scripts");
