// The same view in a notebook with a kernel: Python hears what the reader does, and the reader sees what Python does.

function needPlotly(model) {          // asked of the kernel once a page, so that this script itself starts at once
  if (window.Plotly) return Promise.resolve();
  return new Promise(done => {
    model.on("msg:custom", (message, buffers) => {
      if (message !== "plotly") return;
      if (!window.Plotly) document.head.append(make("script", {}, new TextDecoder().decode(buffers[0])));
      done();
    });
    model.send("plotly");
  });
}

export default {
  async render({model, el}) {
    el.innerHTML = model.get("fragment");
    const root = el.querySelector(".explorer");
    await needPlotly(model);
    const put = await start(root, state => model.send({state}));
    put(model.get("state"));
    model.on("msg:custom", message => { if (message.state) put(message.state); });
  },
};
