package e2e

import (
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/tests/harness"
	"sallyport/tests/netlab"
)

const (
	proxyUser     = "site"
	proxyPassword = "Pr0xyP4ss"
)

// connectProxy is an HTTP proxy on a host of the lab that answers CONNECT with
// basic authentication (RFC 9110, section 9.3.6).
type connectProxy struct {
	host    *netlab.Host
	tunnels atomic.Int64
}

func (p *connectProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(proxyUser+":"+proxyPassword))
	if r.Method != http.MethodConnect || r.Header.Get("Proxy-Authorization") != want {
		w.Header().Set("Proxy-Authenticate", `Basic realm="site"`)
		w.WriteHeader(http.StatusProxyAuthRequired)
		return
	}
	far, err := p.host.Dial("tcp4", r.Host, 5*time.Second)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	near, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		_ = far.Close()
		return
	}
	p.tunnels.Add(1)
	_, _ = io.WriteString(near, "HTTP/1.1 200 Connection established\r\n\r\n")
	pipe := func(to, from net.Conn, r io.Reader) {
		_, _ = io.Copy(to, r) // the end of either side ends the tunnel
		_ = to.Close()
		_ = from.Close()
	}
	go pipe(far, near, buffered)
	go pipe(near, far, far)
}

// behindProxy is a network whose only way out is an HTTP proxy with a password;
// way tells a node of it.
func behindProxy(t *testing.T) (lab *netlab.Lab, proxy *connectProxy, way harness.Option) {
	t.Helper()
	lab = netlab.New(t,
		netlab.Network{Name: "trusted", Policy: netlab.NoInbound, Hosts: []string{"gateway"}},
		netlab.Network{Name: "dmz", Policy: netlab.NoOutbound, Hosts: []string{"dmz-1"}},
		netlab.Network{Name: "proxies", Hosts: []string{"proxy"}},
		netlab.Network{Name: "remote", Policy: netlab.NoInbound, Hosts: []string{"web-1"}})
	if err := lab.Cut(t.Context(), "remote", "dmz", netlab.All); err != nil {
		t.Fatal(err)
	}
	proxy = &connectProxy{host: lab.Host("proxy")}
	listener, err := lab.Host("proxy").Listen(3128)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: proxy, ReadHeaderTimeout: 5 * time.Second}
	ended := make(chan struct{})
	go func() {
		_ = server.Serve(listener) // always http.ErrServerClosed
		close(ended)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-ended
	})
	return lab, proxy, harness.Env("HTTPS_PROXY", "http://"+proxyUser+":"+proxyPassword+"@"+lab.Host("proxy").AddrPort(3128))
}

// TestProxy: a node whose only way out is an HTTP proxy with a password (CH-19).
func TestProxy(t *testing.T) {
	lab, proxy, way := behindProxy(t)
	site := harness.In(t, lab)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"), way)
	node.WaitRunning(15 * time.Second)
	story(t, site, gateway, node)
	if err := usesCarrier(gateway, "web-1", "h2"); err != nil {
		t.Error(err)
	}
	if proxy.tunnels.Load() == 0 {
		t.Error("the proxy made no tunnel")
	}
	closed(t, lab, "dmz-1", "gateway")
}
