"""A server of one frozen base, its adapters and saved classifiers, by the OpenAI API.

| module | what lives there |
|---|---|
| `settings` | the sections of a server's config |
| `app` | the routes, as an ASGI application that needs no Ray |
| `guard` | what every request must pass: token, origin, sizes, number |
| `api_errors` | errors in OpenAI's shape |
| `bodies` | the requests' JSON |
| `adapter_folder` | the adapters of a folder of runs, found again and again |
| `text_model` | the base, its adapters and its engine: prompts in, events out |
| `generation` | requests in the engine, awaited |
| `completions`, `chat` | the answers of the two text endpoints |
| `logprobs` | log-probabilities in their shapes |
| `images`, `image_input` | the endpoint of classifications; images of requests, within limits |
| `classifiers`, `classification` | the classifiers of a folder of runs; the thread that encodes and classifies |
| `static_page`, `page/` | the page to try a server |
| `kernel_caches` | limits of what a CPU's libraries keep |
| `metrics` | counters for Prometheus |
| `replicas` | all replicas as one: what is asked of each |
| `router` | the choice of a request's replica |
| `deployment` | the application on Ray Serve |
"""
