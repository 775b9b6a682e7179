package main

import (
	"image"
	"image/color"
	"regexp"
	"strings"
	"testing"

	qr "github.com/piglig/go-qr"
)

// TestQR reads from the terminal's text what was written.
func TestQR(t *testing.T) {
	for _, text := range []string{"hello", "[Interface]\nPrivateKey = " + strings.Repeat("aB+/", 11) + "\n" + strings.Repeat("AllowedIPs = 192.168.10.0/25\n", 8)} {
		var b strings.Builder
		if err := writeQR(&b, text); err != nil {
			t.Fatal(err)
		}
		got, err := qr.Decode(photograph(t, b.String()))
		if err != nil || got != text {
			t.Errorf("%q is read as %q: %v\n%s", text, got, err, b.String())
		}
	}
}

// photograph is what a terminal shows: two rows of squares in each line.
func photograph(t *testing.T, shown string) image.Image {
	t.Helper()
	const scale = 4
	colours := regexp.MustCompile(`^\x1b\[97;40m(.*)\x1b\[0m$`)
	lines := strings.Split(strings.TrimSuffix(shown, "\n"), "\n")
	img := image.NewGray(image.Rect(0, 0, scale*len([]rune(colours.FindStringSubmatch(lines[0])[1])), 2*scale*len(lines)))
	for y, line := range lines {
		m := colours.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("line %d has not the colours: %q", y, line)
		}
		for x, block := range []rune(m[1]) {
			for i, light := range []bool{strings.ContainsRune("█▀", block), strings.ContainsRune("█▄", block)} {
				for at := range scale * scale {
					if light {
						img.Set(scale*x+at%scale, scale*(2*y+i)+at/scale, color.White)
					}
				}
			}
		}
	}
	return img
}
