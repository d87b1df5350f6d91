for (const slider of document.querySelectorAll(".slider")) {
  const frame = slider.querySelector(".frame"), input = slider.querySelector("input");
  const show = () => frame.style.setProperty("--at", input.value + "%");
  const move = (event) => {
    const box = frame.getBoundingClientRect();
    input.value = Math.round((event.clientX - box.left) / box.width * 100);
    show();
  };
  input.addEventListener("input", show);
  frame.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    frame.setPointerCapture(event.pointerId);
    input.focus({ preventScroll: true });
    move(event);
  });
  frame.addEventListener("pointermove", (event) => frame.hasPointerCapture(event.pointerId) && move(event));
  show();
}
