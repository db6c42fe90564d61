package gateway

import (
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strings"
)

// dropFromTargets are headers of a target's answer that would hold for all of
// the gateway's origin, not only for what stands under the target's path.
var dropFromTargets = []string{"Alt-Svc", "Clear-Site-Data", "Public-Key-Pins", "Service-Worker-Allowed", "Strict-Transport-Security"}

// relaySandbox keeps pages of a target, should a browser show them, away from
// the gateway's own origin.
const relaySandbox = "sandbox allow-scripts allow-forms allow-popups allow-downloads"

// rewrite makes the target's request out of the caller's. The library has
// taken the hop-by-hop headers and all Forwarded and X-Forwarded-* out.
func (rl *relay) rewrite(pr *httputil.ProxyRequest) {
	x := relayedFrom(pr.In.Context())
	h := pr.Out.Header
	h.Del("Authorization")
	if auth := pr.In.Header.Get(headerTargetAuth); auth != "" {
		h.Set("Authorization", auth)
	}
	for name := range h {
		if strings.HasPrefix(name, ownHeaders) {
			delete(h, name)
		}
	}
	pr.SetXForwarded()
	h.Set("X-Forwarded-Prefix", x.prefix)
	h.Set("Forwarded", forwarded(pr.In))
	pr.Out.Trailer = pr.In.Trailer // filled in while the body is read
}

// forwarded is the value of RFC 7239.
func forwarded(in *http.Request) string {
	from := "unknown"
	if ap, err := netip.ParseAddrPort(in.RemoteAddr); err == nil {
		addr := ap.Addr().Unmap().WithZone("")
		if from = addr.String(); addr.Is6() {
			from = `"[` + from + `]"`
		}
	}
	proto := "http"
	if in.TLS != nil {
		proto = "https"
	}
	return "for=" + from + ";host=" + quoted(in.Host) + ";proto=" + proto + ";by=_sallyport"
}

// quoted makes a quoted-string (RFC 9110, section 5.6.4).
func quoted(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, s)
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// cleanResponse fits a target's answer to where it is seen: under the relay's
// path on the gateway's origin.
func (rl *relay) cleanResponse(res *http.Response) error {
	x := relayedFrom(res.Request.Context())
	x.status = res.StatusCode
	h := res.Header
	for name := range h {
		if strings.HasPrefix(name, ownHeaders) {
			delete(h, name)
		}
	}
	for _, name := range dropFromTargets {
		h.Del(name)
	}
	h.Set(headerNode, rl.t.fleet.nameNow(x.via.node))
	h.Add("Content-Security-Policy", relaySandbox)
	if l := h.Get("Location"); l != "" {
		h.Set("Location", x.location(l, res.Request))
	}
	cookies := h["Set-Cookie"]
	for i, c := range cookies {
		cookies[i] = x.cookie(c)
	}
	return nil
}

// location leads a redirect within the target back through the relay.
func (x *relayed) location(l string, sent *http.Request) string {
	base := x.basePath()
	switch u, err := url.Parse(l); {
	case err != nil, u.Opaque != "", u.User != nil:
		return l
	case u.Host != "" && (u.Host != sent.Host || u.Scheme != "" && u.Scheme != "http" && u.Scheme != "https"):
		return l
	case u.Host == "" && (u.Scheme != "" || !strings.HasPrefix(l, "/")):
		return l // relative to the path, or no URL of the web
	default:
		if u.Host != "" {
			_, l, _ = strings.Cut(l, "//")
			l = strings.TrimPrefix(l, u.Host)
		}
		inside, ok := strings.CutPrefix(l, base)
		if !ok || inside != "" && !strings.HasPrefix(inside, "/") && !strings.HasPrefix(inside, "?") && !strings.HasPrefix(inside, "#") {
			return x.prefix + l // outside of the target's base path: shown as it is
		}
		if inside == "" || inside[0] != '/' {
			inside = "/" + inside
		}
		return x.prefix + inside
	}
}

// basePath is the path of the target's URL, without the slash at its end.
func (x *relayed) basePath() string {
	if x.via.spec == nil {
		return ""
	}
	u, err := url.Parse(x.via.spec.URL)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(u.EscapedPath(), "/")
}

// cookie keeps a target's cookie to the target: its path goes below the
// relay's, and its domain is the gateway's alone.
func (x *relayed) cookie(c string) string {
	parts := strings.Split(c, ";")
	out := parts[:1]
	path := "/"
	for _, p := range parts[1:] {
		name, value, _ := strings.Cut(strings.TrimSpace(p), "=")
		switch strings.ToLower(name) {
		case "domain":
		case "path":
			if strings.HasPrefix(value, "/") {
				path = value
			}
		default:
			out = append(out, p)
		}
	}
	path = strings.TrimPrefix(path, x.basePath())
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	return strings.Join(append(out, " Path="+x.prefix+path), ";")
}
