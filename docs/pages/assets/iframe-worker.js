// Browsers give no worker to pages that are read from the disk: there the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.ready = new Promise(resolve => {
        document.addEventListener("DOMContentLoaded", resolve, { once: true })
        if (document.readyState !== "loading") resolve()
      }).then(() => new Promise((resolve, reject) => {
        document.body.appendChild(this.frame)
        const inside = this.frame.contentWindow
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        const script = inside.document.createElement("script")
        script.onload = resolve
        script.onerror = reject
        script.src = url
        inside.document.body.appendChild(script)
      }))
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
