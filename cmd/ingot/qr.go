package main

import (
	"fmt"
	"io"
	"strings"

	qr "github.com/piglig/go-qr"
)

// quiet is the light margin that a QR code needs, in modules (ISO/IEC 18004).
const quiet = 4

// writeQR shows text as a QR code, two rows in a line. Light and dark are said by
// colours: what a terminal's own are, nobody knows.
func writeQR(w io.Writer, text string) error {
	code, err := qr.EncodeText(text, qr.Low)
	if err != nil {
		return fmt.Errorf("make a QR code: %w", err)
	}
	size := code.Size()
	light := func(x, y int) bool {
		return x < 0 || y < 0 || x >= size || y >= size || !code.Module(x, y)
	}
	blocks := map[[2]bool]rune{{true, true}: '█', {true, false}: '▀', {false, true}: '▄', {false, false}: ' '}
	var b strings.Builder
	for y := -quiet; y < size+quiet; y += 2 {
		b.WriteString("\x1b[97;40m")
		for x := -quiet; x < size+quiet; x++ {
			b.WriteRune(blocks[[2]bool{light(x, y), light(x, y+1)}])
		}
		b.WriteString("\x1b[0m\n")
	}
	_, err = io.WriteString(w, b.String())
	return err
}
