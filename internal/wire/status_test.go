package wire

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// However many policies fail, and whatever their errors hold, a hello fits.
func TestHelloFitsWhateverFails(t *testing.T) {
	for _, text := range []string{strings.Repeat("x", 1<<10), strings.Repeat("\x01<", 1<<9), strings.Repeat("é\xff", 300)} {
		h := Hello{Tags: map[string]string{"a": strings.Repeat("b", 100<<10)}}
		for i := range 5000 {
			h.Policies = append(h.Policies, PolicyStatus{Name: fmt.Sprintf("policy-%d-%s", i, strings.Repeat("n", 50)), Type: "files", Digest: strings.Repeat("d", 64),
				State: PolicyFailed, Error: text, Since: time.Now()})
		}
		FitStatuses(h.Policies)
		b, err := json.Marshal(h)
		if err != nil || len(b) > MaxHello {
			t.Fatalf("%d bytes, %v", len(b), err)
		}
		if n := jsonSize(h.Policies[4999].Error); n < minStatusError {
			t.Fatalf("only %d bytes are left of an error", n)
		}
	}
	few := []PolicyStatus{{Name: "a", Error: strings.Repeat("x", 1<<10)}, {Name: "b"}}
	FitStatuses(few)
	if len(few[0].Error) != 1<<10 || few[1].Error != "" {
		t.Fatalf("a single error was clipped to %d bytes", len(few[0].Error))
	}
}
