package parking

import (
	"bufio"
	"bytes"
	"net/http"
	"strings"
	"testing"
)

// FuzzRequestHead: whatever a client sends, the service is given one header,
// without what was between client and proxy, for the service that was checked.
func FuzzRequestHead(f *testing.F) {
	f.Add([]byte("GET http://files/a?b=c HTTP/1.1\r\nHost: other\r\nConnection: X-A\r\nX-A: 1\r\n\r\n"))
	f.Add([]byte("POST http://files/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"))
	f.Add([]byte("GET http://files/ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: a\r\nProxy-Authorization: b\r\n\r\n"))
	f.Add([]byte("POST http://files/ HTTP/1.1\r\nHost: a\r\nConnection: content-length, host\r\nContent-Length: 5\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
		if err != nil || r.Method == http.MethodConnect {
			return
		}
		service, err := serviceOf(r)
		if err != nil {
			return
		}
		head := requestHead(r)
		if n := bytes.Count(head, []byte("\r\n\r\n")); n != 1 || !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
			t.Fatalf("%d headers: %q", n, head)
		}
		again, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(head)))
		if err != nil {
			t.Fatalf("%q: %v", head, err)
		}
		if again.Method != r.Method || again.RequestURI != r.URL.RequestURI() || !strings.HasPrefix(strings.ToLower(again.Host), service) {
			t.Fatalf("%q became %q", b, head)
		}
		if len(again.TransferEncoding) != len(r.TransferEncoding) || again.ContentLength != r.ContentLength {
			t.Fatalf("the body of %q is another in %q", b, head)
		}
		for _, name := range []string{"Proxy-Connection", "Proxy-Authorization", "Keep-Alive"} {
			if again.Header.Get(name) != "" {
				t.Fatalf("%s went on: %q", name, head)
			}
		}
	})
}
