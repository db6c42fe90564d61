package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"
	"time"

	"sallyport/tests/harness"
)

// TestLocalProxy: curl at the proxies of an RCP and a node reaches the services
// that the gateway names, and nothing else.
func TestLocalProxy(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	service := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Errorf("body: %v", err)
		}
		_, _ = fmt.Fprintf(w, "%s %s host=%s body=%d proxy=%q", r.Method, r.URL.Path, r.Host, len(b), r.Header.Get("Proxy-Connection"))
	})
	plain := httptest.NewServer(service)
	defer plain.Close()
	secure := httptest.NewTLSServer(service)
	defer secure.Close()
	address := func(url string) string { return url[strings.Index(url, "//")+2:] }

	site := harness.New(t)
	dead := harness.FreePort(t)
	atRCP, atNode := harness.FreePort(t), harness.FreePort(t)
	gateway := site.Gateway(harness.Env("SALLYPORT_GATEWAY_ACCEPT",
		fmt.Sprintf("files=%s;acme=%s;down=127.0.0.1:%d", address(plain.URL), address(secure.URL), dead)))
	site.RCP(gateway, "dmz-1", harness.Env("SALLYPORT_RCP_PROXY_LISTEN", fmt.Sprintf("127.0.0.1:%d", atRCP)))
	site.Node(gateway, "web-1", harness.Env("SALLYPORT_NODE_PROXY_LISTEN", fmt.Sprintf("127.0.0.1:%d", atNode))).WaitRunning(runningWithin)

	curl := func(port uint16, args ...string) (code, body string) {
		t.Helper()
		args = append([]string{"-sS", "-k", "--max-time", "30", "--noproxy", "", "-x", fmt.Sprintf("http://127.0.0.1:%d", port), "-w", "\n%{http_code} %{http_connect}"}, args...)
		out, err := exec.CommandContext(t.Context(), "curl", args...).Output() // fails where CONNECT is refused: the code says it
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		if len(out) == 0 {
			t.Fatalf("curl %v: %v", args, err)
		}
		return lines[len(lines)-1], strings.Join(lines[:len(lines)-1], "\n")
	}
	upload := site.File("upload", strings.Repeat("x", 300_000))
	for where, port := range map[string]uint16{"RCP": atRCP, "node": atNode} {
		t.Run(where, func(t *testing.T) {
			harness.Eventually(t, 20*time.Second, "the proxy answers", func() error {
				if code, body := curl(port, "http://files/x/y"); code != "200 000" || body != `GET /x/y host=files body=0 proxy=""` {
					return fmt.Errorf("%s: %s", code, body)
				}
				return nil
			})
			if code, body := curl(port, "-T", upload, "http://FILES:8080/up"); code != "200 000" || body != `PUT /up host=FILES:8080 body=300000 proxy=""` {
				t.Errorf("upload: %s: %s", code, body)
			}
			if code, body := curl(port, "https://acme/directory"); code != "200 200" || !strings.HasPrefix(body, "GET /directory host=acme") {
				t.Errorf("CONNECT: %s: %s", code, body)
			}
			if code, body := curl(port, "http://"+address(plain.URL)+"/"); code != "403 000" || !strings.Contains(body, "no such service") {
				t.Errorf("an address of the client's choice: %s: %s", code, body)
			}
			if code, _ := curl(port, "https://other/"); code != "000 403" {
				t.Errorf("CONNECT to what nobody named: %s", code)
			}
			if code, body := curl(port, "http://down/"); code != "502 000" || strings.Contains(body, fmt.Sprint(dead)) {
				t.Errorf("a service that is down: %s: %s", code, body)
			}
			if code, _ := curl(port, "https://down/"); code != "000 502" {
				t.Errorf("CONNECT to a service that is down: %s", code)
			}
		})
	}
	gateway.Kill()
	if code, body := curl(atNode, "http://files/"); code != "504 000" || !strings.Contains(body, "no gateway") {
		t.Errorf("without a gateway: %s: %s", code, body)
	}
}
