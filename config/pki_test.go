package config_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/config"
)

func TestPassphrase(t *testing.T) {
	const good = "correct horse battery"
	for content, want := range map[string]string{
		good: "", good + "\n": "", good + "\r\n": "", " " + good + " \n": "", // white space counts, the end of the line does not
		"": "at least 12", "short\n": "at least 12", good + "\nand more\n": "more than one line", good + "\x00": "more than one line",
		strings.Repeat("x", 1025): "longer than 1024", strings.Repeat("x", 1<<20): "longer than 1024",
	} {
		file := filepath.Join(t.TempDir(), "pass")
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := config.LoadPKI([]string{"SALLYPORT_DATA=" + t.TempDir(), "SALLYPORT_PKI_PASSPHRASE_FILE=" + file})
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.Passphrase()
		switch {
		case want == "" && (err != nil || got.Reveal() != strings.TrimRight(content, "\r\n")):
			t.Errorf("%.40q: %q, %v", content, got.Reveal(), err)
		case want != "" && (!errors.Is(err, config.ErrConfig) || !strings.Contains(err.Error(), want)):
			t.Errorf("%.40q: %v, want it to say %q", content, err, want)
		case err != nil && strings.Contains(err.Error(), "horse"):
			t.Errorf("the error repeats the passphrase: %v", err)
		case strings.Contains(fmt.Sprintf("%v %+v %#v", got, got, got), "horse"):
			t.Errorf("the passphrase shows itself: %v", got)
		}
	}
	if got, err := (config.PKI{}).Passphrase(); got != "" || err != nil {
		t.Errorf("without a file: %v, %v", got, err)
	}
	if _, err := (config.PKI{PassphraseFile: "/nowhere/at/all"}).Passphrase(); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "SALLYPORT_PKI_PASSPHRASE_FILE") {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestExternalCA(t *testing.T) {
	all := []string{"SALLYPORT_DATA=/d", "SALLYPORT_PKI_CA=https://ca.example:9000/", "SALLYPORT_PKI_CA_ROOT_FILE=r", "SALLYPORT_PKI_CA_PROVISIONER=p", "SALLYPORT_PKI_CA_KEY_FILE=k"}
	if c, err := config.LoadPKI(all); err != nil || c.CA != "https://ca.example:9000" {
		t.Errorf("%q, %v", c.CA, err)
	}
	for i := 1; i < len(all); i++ { // each of them is needed by the others
		some := append(append([]string{}, all[:i]...), all[i+1:]...)
		if _, err := config.LoadPKI(some); !errors.Is(err, config.ErrConfig) {
			t.Errorf("without %s: %v", all[i], err)
		}
	}
	sum := strings.Repeat("ab", 32)
	for fingerprint, want := range map[string]bool{sum: true, strings.ToUpper(sum): true, strings.TrimSuffix(strings.Repeat("ab:", 32), ":"): true, sum[2:]: false, "SHA256:abc": false, strings.Repeat("xy", 32): false} {
		some := append([]string{"SALLYPORT_PKI_CA_FINGERPRINT=" + fingerprint}, all[:2]...)
		some = append(some, all[3:]...) // in the place of the file
		if c, err := config.LoadPKI(some); (err == nil) != want {
			t.Errorf("fingerprint %q: %v, %v", fingerprint, c.CAFingerprint, err)
		}
	}
	if _, err := config.LoadPKI([]string{"SALLYPORT_DATA=/d", "SALLYPORT_PKI_CA_FINGERPRINT=" + sum}); !errors.Is(err, config.ErrConfig) {
		t.Errorf("a fingerprint without a CA: %v", err)
	}
	for _, bad := range []string{"http://ca:9000", "ca:9000", "https://", "https://u:p@ca", "https://ca/x", "https://ca?x=1"} {
		some := append(append([]string{}, all...), "SALLYPORT_PKI_CA="+bad)
		if _, err := config.LoadPKI(some); !errors.Is(err, config.ErrConfig) {
			t.Errorf("%s is taken", bad)
		}
	}
}
